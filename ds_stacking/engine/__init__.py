"""The only room that imports deepspeed: engines, their ZeRO state by parameter name, and the stage manager."""

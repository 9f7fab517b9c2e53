"""What grows into what: operators, plans, optimizer state policies and the one executor. Imports torch only."""

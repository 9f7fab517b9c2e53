"""Does stacking pay? Arms of a recipe at equal cost."""

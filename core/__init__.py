"""What every room agrees on: schedules, predictions, plans, the update, manifests, errors. NumPy and pydantic only."""

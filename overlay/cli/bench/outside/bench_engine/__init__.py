"""What runs inside a process that holds an engine. Nothing in here imports anything of the overlay."""

"""A run: its settings, its directory and what is in it, the processes and the hardware that it is made on."""

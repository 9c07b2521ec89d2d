"""The operating system: command-line errors, files, locks, signals, standard output, processor and memory."""

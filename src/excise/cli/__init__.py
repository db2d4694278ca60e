"""The command line: arguments, progress, tables, exit codes. The only part that prints."""

"""The loop that joins scheduler and runner, and the process around it."""

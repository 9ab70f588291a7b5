"""What `headrace doctor` finds out: this machine, what a worker would use of it, what is missing."""

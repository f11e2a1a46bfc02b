"""What `rootstockd doctor` looks at: facts are gathered by one function, and judged by others that do no I/O."""

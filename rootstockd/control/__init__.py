"""The control plane: HTTP and JSON on a second Unix socket."""

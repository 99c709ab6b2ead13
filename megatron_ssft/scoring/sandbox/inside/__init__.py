"""Code that runs inside the sandbox: started by path with `python -I`, it imports only the standard library."""

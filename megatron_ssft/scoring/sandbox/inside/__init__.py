"""What runs inside the sandbox: started by path with `python -I`, it imports nothing but the standard library."""

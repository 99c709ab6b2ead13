"""What runs inside the walls: started by path with `python -I`, it imports nothing but the standard library."""

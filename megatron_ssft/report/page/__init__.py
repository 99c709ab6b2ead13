"""The HTML page that holds the pictures, and its summary."""

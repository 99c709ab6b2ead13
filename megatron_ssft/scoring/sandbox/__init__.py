"""Generated programs run here: isolated, limited, watched from outside."""

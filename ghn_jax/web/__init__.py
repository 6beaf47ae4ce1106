"""A page to try a hypernetwork in a browser; `page.py` alone needs Gradio."""

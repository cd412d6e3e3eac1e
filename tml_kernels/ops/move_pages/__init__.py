from .api import move_pages as move_pages

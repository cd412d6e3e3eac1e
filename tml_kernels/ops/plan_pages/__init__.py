from .api import plan_pages as plan_pages

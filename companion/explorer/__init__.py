"""The explorer of λ and μ: in the book's page (page.py, explorer.js) and live in a notebook (live.py)."""

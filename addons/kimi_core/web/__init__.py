"""The stats page's server: who may ask, the page, its JSON API, and what addons add to it."""

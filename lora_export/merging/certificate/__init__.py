"""merge-certificate.json: written, read, and proved again."""

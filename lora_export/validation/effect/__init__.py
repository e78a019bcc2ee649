"""What an adapter does to outputs, and how much of it each result keeps."""

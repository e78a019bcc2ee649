"""What results are made of: hashes of the files of bases and adapters, and keys of all inputs."""

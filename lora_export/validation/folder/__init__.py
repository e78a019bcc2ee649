"""What lies in a merged folder beside what the models compute: settings, files, stored tensors."""

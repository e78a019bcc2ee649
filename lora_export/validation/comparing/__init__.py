"""The unmerged and the merged model compared: outputs, tensors, noise floors, thresholds."""

"""The unmerged model, built by PEFT and transformers themselves, in these steps:

1. `loading` loads the base in fp32, dequantized where it has to be (`quantized`), in the class that was trained
   (`trained`), and layer by layer where it does not fit into memory (`streaming`).
2. `foreign` and `renamed` rewrite adapters that PEFT cannot load; `combined` makes one adapter of several.
3. `unmerged` attaches the adapters, and refuses what PEFT leaves over.
4. `mended` makes PEFT's layers answer what validation asks.
5. `probes` and `whole` ask the layers what they compute.

`files` reads headers and settings; `second_reader` reads a quantized base by its own library.
"""

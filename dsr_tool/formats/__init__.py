"""File formats without torch: codecs, archives, CSR files, a strict safetensors reader, and footprints."""

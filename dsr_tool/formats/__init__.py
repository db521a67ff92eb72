"""What lies in files: codecs, the archive, CSR in .npz, safetensors read strictly, and the footprint of each."""

"""Bytes on disk, shared by all rooms: atomic files, safetensors."""

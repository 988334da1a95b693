"""How good are scores? One file a protocol."""

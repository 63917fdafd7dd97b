"""The servers and the command line around the runtime `moe_jax`, which imports nothing from here."""

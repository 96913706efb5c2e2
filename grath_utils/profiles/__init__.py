"""The profiles: one YAML file each."""

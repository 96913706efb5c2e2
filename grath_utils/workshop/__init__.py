"""Around the course: the environment, checkpoints, a classroom without network, rendering."""

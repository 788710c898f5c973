"""`make gpu`: every role on a GPU, in one process, without Ray: is it right, and how fast is it."""

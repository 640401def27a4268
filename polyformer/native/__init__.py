"""The native runtime: specs lowered to programs, which one native call runs for each step."""

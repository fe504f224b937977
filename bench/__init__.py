"""The lab: what is measured, and how."""

"""Every user-facing setting as a frozen dataclass; standard library only."""

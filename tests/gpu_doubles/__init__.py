"""What stands in for a GPU; README.md says what each part proves."""

"""Settings: the schema of `conf/`, and how an override string becomes checked settings."""

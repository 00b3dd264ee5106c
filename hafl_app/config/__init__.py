"""Settings: the schema of `conf/`, and composing checked settings from overrides."""

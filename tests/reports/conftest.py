from round_records import round_record, untrained  # noqa: F401  fixtures

"""One study on many workers, by Ray: the driver asks and tells, whoever is free measures."""

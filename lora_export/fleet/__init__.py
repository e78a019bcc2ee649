"""Many adapters of a few bases: jobs, keys, stores, engines, and the driver that joins them."""

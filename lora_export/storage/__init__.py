"""Files on a disk: read with distrust, written all or nothing, shared out over the cores."""

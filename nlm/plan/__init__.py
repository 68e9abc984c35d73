"""What a config will cost, before anything is allocated: memory, arithmetic, communication, time."""

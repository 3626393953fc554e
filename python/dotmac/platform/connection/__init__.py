"""How the platform reaches its servers: addresses, given clients, embedded servers, the engine's bridge."""

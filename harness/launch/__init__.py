"""Where stages run: the local pool, its driver, retries. Starts workers, never imports them."""

"""The gateway: the swarm behind the HTTP API that developers know from OpenAI."""

"""What frameworks need: FastAPI, Celery, gevent. Each module imports its framework; nothing else does."""

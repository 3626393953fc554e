-- ARGV 1 sid. The session ends; what it still held was released before, in the same pipeline.
redis.call('HDEL', KEYS[1], ARGV[1], '@' .. ARGV[1], '!' .. ARGV[1])
redis.call('ZREM', KEYS[6], ARGV[1])
return 1

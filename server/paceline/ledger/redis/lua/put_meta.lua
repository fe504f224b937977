-- Keep a small value unless there is one.
-- KEYS: the values (a hash)
-- ARGV: name, value
-- answer: the value that counts

redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
return redis.call('HGET', KEYS[1], ARGV[1])

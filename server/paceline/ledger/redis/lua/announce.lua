-- Keep a process on the list for a while, and say who else lives.
-- KEYS: the processes (a hash by name), until when (a sorted set), the ledgers' names (a set)
-- ARGV: name, the packed process, for how many µs (0: take it off)
-- answer: now, name and packed process by turns, the ledgers

local parts = redis.call('TIME')
local now = tonumber(parts[1]) * 1000000 + tonumber(parts[2])
local ttl = tonumber(ARGV[3])
if ttl > 0 then
  redis.call('ZADD', KEYS[2], string.format('%.0f', now + ttl), ARGV[1])
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
else
  redis.call('ZREM', KEYS[2], ARGV[1])
  redis.call('HDEL', KEYS[1], ARGV[1])
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now))) do
  redis.call('ZREM', KEYS[2], name)
  redis.call('HDEL', KEYS[1], name)
end
return {string.format('%.0f', now), redis.call('HGETALL', KEYS[1]), redis.call('SMEMBERS', KEYS[3])}

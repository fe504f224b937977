-- Put back what a failover has lost: a new head in the place of the expected one, and the records between.
-- KEYS: the head, the log, the new head's snapshot
-- ARGV: '1' if a head is expected, '0' if none; the expected epoch, nonce, seq, hash; the new head's 22 values in their
--   order; then number and packed record, for each record
-- answer: ok, now, head
--         fenced, now, head
--         gone, now, head: the new head's snapshot is not whole

local now = time()
local head = load(KEYS[1])
local expected = ARGV[1] == '1'
if expected ~= (head ~= nil) then
  return answer('fenced', now, head)
end
if expected and not (owned(head, ARGV[2], ARGV[3]) and head[SEQ] == ARGV[4] and head[HASH] == ARGV[5]) then
  return answer('fenced', now, head)
end
local new = {}
for field = 1, #FIELDS do
  new[field] = ARGV[5 + field]
end
local name = new[SNAPSHOT]
local before = head and head[SNAPSHOT] or ''
local fresh = not head or name ~= before
if fresh and name ~= '' and redis.call('HLEN', KEYS[3]) ~= tonumber(new[SNAPSHOT_CHUNKS]) then
  return answer('gone', now, head)
end

new[UNTIL] = int(now + (tonumber(new[UNTIL]) - tonumber(new[CONFIRMED_AT])))
new[CONFIRMED_AT] = int(now)
put_all(KEYS[1], new)
if fresh then
  redis.call('DEL', KEYS[2])
  if name ~= '' then
    redis.call('PERSIST', KEYS[3])
  end
  if before ~= '' then
    redis.call('UNLINK', string.sub(KEYS[3], 1, #KEYS[3] - #name) .. before)
  end
else
  local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
  if last and tonumber(string.match(last[1], '^%d+')) > tonumber(ARGV[4]) then
    -- Not written by these scripts. A stream does not take a lower number again, so it is made anew.
    local kept = redis.call('XRANGE', KEYS[2], '-', ARGV[4] .. '-0')
    redis.call('DEL', KEYS[2])
    for _, entry in ipairs(kept) do
      redis.call('XADD', KEYS[2], entry[1], 'r', entry[2][2])
    end
  end
end
for index = 6 + #FIELDS, #ARGV, 2 do
  redis.call('XADD', KEYS[2], ARGV[index] .. '-0', 'r', ARGV[index + 1])
end
return answer('ok', now, new)

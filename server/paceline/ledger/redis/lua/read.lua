-- Records behind a number, oldest first.
-- KEYS: the log
-- ARGV: the number, how many at most, bytes at which to stop
-- answer: the packed records; at least one if there is any

local start, left, room = tonumber(ARGV[1]) + 1, tonumber(ARGV[2]), tonumber(ARGV[3])
local records = {}
while left > 0 and room > 0 do
  local page = redis.call('XRANGE', KEYS[1], string.format('%.0f-0', start), '+', 'COUNT', math.min(left, 16))
  if #page == 0 then
    break
  end
  for _, entry in ipairs(page) do
    local record = entry[2][2]
    if #records > 0 and #record > room then
      return records
    end
    records[#records + 1] = record
    room = room - #record
    left = left - 1
    start = tonumber(string.match(entry[1], '^%d+')) + 1
  end
end
return records
